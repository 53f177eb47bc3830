"""An Ethernet switch in user space, with DHCP, names and a way out, for machines of a user without privileges."""
