"""What every architecture must do: tests for pytest, which `contextlm check` runs on one's own."""
