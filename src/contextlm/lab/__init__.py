"""From a recipe to a run folder: what is to be done, what is done, and who does it."""
