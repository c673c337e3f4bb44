"""Phase 1 (OACD) and phase 2 (next-token training). Imports models and data."""
