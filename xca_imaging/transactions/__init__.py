"""One module per IHE transaction: typed request and response, decode and encode."""
