"""One module for each type of pool; which there are is said in `kvik.storage.types`."""
