"""The meaning of document metadata (IHE ITI TF-3, section 4), as plain values."""
