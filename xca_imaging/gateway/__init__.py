"""The IHE actors: what answers at each endpoint."""
