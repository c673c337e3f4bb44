"""Tables, plots and the page of a run. Imports evaluation.result only."""
