"""Model code that two chapters share and transformers lacks."""
