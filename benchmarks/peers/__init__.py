"""The same model and workload in Duetto and in its peers, one after the other, on this machine."""
