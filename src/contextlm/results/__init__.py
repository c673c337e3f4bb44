"""What a run found, typed and versioned: written by evaluation and lab, read by the report."""
