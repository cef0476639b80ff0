"""Which of several engines gets a request. The simulator and the cluster ask the same functions."""
