"""What connects machines with each other and the world. So far: ports of bridges that the host has."""
