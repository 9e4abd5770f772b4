"""IHE XDS-I.b / XCA-I imaging exchange node."""

__version__ = "0.1.0"
