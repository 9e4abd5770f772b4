"""Transport security and, as they come, assertions, policy and audit."""
