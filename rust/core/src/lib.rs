//! Guest memory, virtqueues, I/O threads and KVM: what is hot, shared with a guest, or unsafe.
