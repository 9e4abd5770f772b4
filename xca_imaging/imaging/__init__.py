"""The throughput core: manifests, plans, ledger, scheduler, spool and store SCP."""
