"""Network filters: libvirt's nwfilter documents, compiled to nftables' bridge family."""
