//! A timer whose file descriptor an I/O thread can wait for.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// A timerfd on the monotonic clock, readable once it has expired. Starts stopped.
pub struct Timer(OwnedFd);

impl Timer {
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes flags only.
        let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK | libc::TFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: an fd that nobody else has.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Expire `first` from now, at once if that is zero, then every `interval` unless that is zero.
    pub fn start(&self, first: Duration, interval: Duration) {
        self.set(first.max(Duration::from_nanos(1)), interval);
    }

    pub fn stop(&self) {
        self.set(Duration::ZERO, Duration::ZERO);
    }

    fn set(&self, first: Duration, interval: Duration) {
        let times = libc::itimerspec { it_interval: timespec(interval), it_value: timespec(first) };
        // SAFETY: `times` is read, and nothing is written. It cannot fail: the fd is a timer, the times are in range.
        unsafe { libc::timerfd_settime(self.0.as_raw_fd(), 0, &raw const times, std::ptr::null_mut()) };
    }

    /// How often it expired since this was last asked; 0 makes its fd wait for the next time.
    pub fn take(&self) -> u64 {
        let mut count = [0u8; 8];
        // SAFETY: reads at most 8 bytes into 8 bytes of ours.
        let read = unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
        if read == 8 {
            u64::from_ne_bytes(count)
        } else {
            0
        }
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn timespec(duration: Duration) -> libc::timespec {
    let seconds = duration.as_secs().min(u32::MAX.into()) as libc::time_t;
    libc::timespec { tv_sec: seconds, tv_nsec: duration.subsec_nanos().into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_expires_again_and_again_until_it_is_stopped() {
        let timer = Timer::new().expect("a timer");
        assert_eq!(timer.take(), 0);
        timer.start(Duration::ZERO, Duration::from_micros(100));
        let mut expired = 0;
        while expired < 3 {
            expired += timer.take();
        }
        timer.stop();
        assert_eq!(timer.take(), 0);
    }
}
