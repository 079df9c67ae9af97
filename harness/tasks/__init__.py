"""Tasks: what a model is trained for. Each says which class of model it takes, its rows, its objective, its answers."""
