"""Devices served to the virtual machine monitors of others."""
