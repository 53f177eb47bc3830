"""What a guest's processors are: topology, CPUID, models; their state saved and restored."""
