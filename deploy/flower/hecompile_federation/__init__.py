"""The parts that Flower loads; the code is in runtime.federation.flower."""
