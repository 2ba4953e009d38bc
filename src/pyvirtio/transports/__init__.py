"""Transports: the registers through which a guest's driver finds a device and talks to it."""
