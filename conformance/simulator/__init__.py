"""A simulator: the node's own scheduler against modelled PACSs, in virtual time, the same for the same seed."""
