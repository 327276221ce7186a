// Draws the pictures in the theme that the reader's system asks for, and again when that or the width changes.
"use strict";
(function () {
  const drawings = JSON.parse(document.getElementById("drawings").textContent);
  const places = Array.from(document.querySelectorAll("[data-picture]"));
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 560px)");
  const printing = window.matchMedia("print");

  function layoutFor(layout) {
    if (!narrow.matches) return layout;
    // On a phone: smaller letters, the margins go to the picture, and the legend needs more lines.
    const font = Object.assign({}, layout.font, { size: 11 });
    const margin = Object.assign({}, layout.margin, { l: 44, r: 8 });
    const changes = { font: font, margin: margin, height: layout.meta.narrowHeight };
    if (layout.xaxis.nticks) changes.xaxis = Object.assign({}, layout.xaxis, { nticks: 4 });
    if (layout.meta.narrowRange) changes.xaxis.range = layout.meta.narrowRange;
    return Object.assign({}, layout, changes);
  }

  function config(name) {
    return {
      responsive: true,
      displaylogo: false,
      displayModeBar: narrow.matches ? false : "hover",
      modeBarButtons: [["toImage"]],
      toImageButtonOptions: { format: "svg", filename: name },
    };
  }

  function draw() {
    const theme = dark.matches && !printing.matches ? "dark" : "light";
    const drawn = places.map(function (place) {
      const figure = structuredClone(drawings[place.dataset.picture][theme]);
      return Plotly.react(place, figure.data, layoutFor(figure.layout), config(place.dataset.picture));
    });
    Promise.all(drawn).then(function () {
      document.documentElement.dataset.drawn = theme + " " + places.length;
    });
  }

  [dark, narrow, printing].forEach(function (query) { query.addEventListener("change", draw); });
  draw();
})();
