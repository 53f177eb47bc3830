"""PCI as a guest sees it: configuration space, BARs, MSI-X, the bus and its hot-plug."""
