"""The wiring: recipes, the command line, and the Prefect flow over the stages. No tensors and no SQL in here."""
