"""Measures back-ends of vhost-user without a virtual machine."""
