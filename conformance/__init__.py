"""The conformance harness: published Connectathon cases against a node that it starts.

The node is met as partners meet it: by its configuration, its commands and its endpoints. Nothing of the package is
imported, but by the simulator of the scheduler (`python -m conformance.simulator`). `python -m conformance --help` says
what can be chosen; each folder is a family of cases with a readme.
"""
