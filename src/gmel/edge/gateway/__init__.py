"""The gateway: what devices, servers and operators call."""
