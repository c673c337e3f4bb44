"""Quality, memory and speed of a trained model. Imports models and data."""
