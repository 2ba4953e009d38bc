//! Anything with a file descriptor that an I/O thread waits for besides its queues.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use crate::iothread::IoThread;
use crate::sync::duplicate;

/// What to do when an fd is ready.
pub trait Watcher: Send + Sync {
    /// Runs on the I/O thread, again and again while the fd is ready; false disarms the watch.
    ///
    /// Now and then there is nothing (somebody else was faster, or the watch was disarmed meanwhile): never block.
    /// Do a bounded amount of work, because the queues of the thread wait.
    fn ready(&self) -> bool;
}

/// A file descriptor that an I/O thread waits for; dropping it ends that. Any thread.
///
/// A call that runs already may go on after `disarm` and after the drop, but none begins. Disarmed it costs the
/// thread nothing, not even for a hangup. Its owner must drop it: the thread keeps the watcher alive while armed.
pub struct Watch {
    thread: Arc<IoThread>,
    /// A duplicate: its number is nobody else's as long as the thread may report it.
    fd: OwnedFd,
    events: EventSet,
    watcher: Arc<dyn Watcher>,
}

impl IoThread {
    /// Call `watcher` whenever `fd` is readable. The fd is duplicated; the watch starts armed.
    pub fn watch(self: &Arc<Self>, fd: RawFd, watcher: Arc<dyn Watcher>) -> io::Result<Watch> {
        let watch = self.unarmed(fd, EventSet::IN, watcher)?;
        watch.arm()?;
        Ok(watch)
    }

    /// The same for an fd that can be written to. The watch starts disarmed: most can, most of the time.
    pub fn watch_writable(self: &Arc<Self>, fd: RawFd, watcher: Arc<dyn Watcher>) -> io::Result<Watch> {
        self.unarmed(fd, EventSet::OUT, watcher)
    }

    fn unarmed(self: &Arc<Self>, fd: RawFd, events: EventSet, watcher: Arc<dyn Watcher>) -> io::Result<Watch> {
        Ok(Watch { thread: self.clone(), fd: duplicate(fd)?, events, watcher })
    }
}

impl Watch {
    /// Wait for the fd from now on. Does nothing while armed; else it costs one system call.
    pub fn arm(&self) -> io::Result<()> {
        self.thread.arm(self.fd.as_raw_fd(), self.events, &self.watcher)
    }

    /// Leave the fd alone until `arm`. Does nothing while disarmed; else it costs one system call.
    pub fn disarm(&self) {
        self.thread.disarm(self.fd.as_raw_fd(), &self.watcher);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.disarm();
    }
}
