"""Name the apps that Flower loads; the code is in hecompile.runtime.federation.flower."""
