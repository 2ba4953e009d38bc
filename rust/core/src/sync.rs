//! The primitives of the notification protocol: the standard library's, or loom's when the model is built.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

#[cfg(loom)]
pub use loom::sync::atomic::{fence, AtomicBool, AtomicU16, AtomicU64, AtomicU8, Ordering};
#[cfg(loom)]
pub use loom::sync::{Condvar, Mutex};
#[cfg(not(loom))]
pub use std::sync::atomic::{fence, AtomicBool, AtomicU16, AtomicU64, AtomicU8, Ordering};
#[cfg(not(loom))]
pub use std::sync::{Condvar, Mutex};

#[cfg(loom)]
pub use self::model::EventFd;
#[cfg(not(loom))]
pub use self::real::EventFd;

/// An fd of our own for the same open file; it is closed on exec.
pub fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: borrowed for this call only; the kernel refuses an fd that is not open.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
}

#[cfg(not(loom))]
mod real {
    use std::io;
    use std::os::fd::{AsRawFd, RawFd};

    use vmm_sys_util::eventfd;

    /// A non-blocking eventfd.
    #[derive(Debug)]
    pub struct EventFd(eventfd::EventFd);

    impl EventFd {
        pub fn new() -> io::Result<Self> {
            eventfd::EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Self)
        }

        pub fn signal(&self) {
            // The only failure is a saturated counter, and then it is signalled already.
            let _ = self.0.write(1);
        }

        /// Clear it; return how often it was signalled.
        pub fn take(&self) -> u64 {
            self.0.read().unwrap_or(0)
        }
    }

    impl AsRawFd for EventFd {
        fn as_raw_fd(&self) -> RawFd {
            self.0.as_raw_fd()
        }
    }
}

#[cfg(loom)]
mod model {
    use std::io;
    use std::os::fd::{AsRawFd, RawFd};

    use super::{AtomicU64, Ordering};

    /// Stands in for an eventfd in the model. The kernel's has a lock; here acquire and release must do.
    #[derive(Debug)]
    pub struct EventFd(AtomicU64);

    impl EventFd {
        pub fn new() -> io::Result<Self> {
            Ok(Self(AtomicU64::new(0)))
        }

        pub fn signal(&self) {
            self.0.fetch_add(1, Ordering::AcqRel);
        }

        pub fn take(&self) -> u64 {
            self.0.swap(0, Ordering::AcqRel)
        }
    }

    impl AsRawFd for EventFd {
        fn as_raw_fd(&self) -> RawFd {
            -1
        }
    }
}
