"""The virtual machine: memory, CPUs, firmware or kernel, platform devices and the console."""
