"""Load generator, metrics of requests, micro-benchmarks: behind `duetto bench` and `calibrate`."""
