"""What a recipe may say: schema, strict YAML, scales and overrides. Imports no torch."""
