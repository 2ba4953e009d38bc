//! File descriptors that an I/O thread waits for besides its queues.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use pyvirtio_core::sync::EventFd;
use pyvirtio_core::{IoThread, Watcher};

pub const HANG: Duration = Duration::from_secs(10);

/// A loop on its thread, which ends with the value.
pub struct Running(pub Arc<IoThread>, Option<JoinHandle<()>>);

impl Running {
    pub fn new() -> Self {
        let thread = Arc::new(IoThread::new(0, 0, 0).unwrap());
        let looping = thread.clone();
        Self(thread, Some(std::thread::spawn(move || looping.run().unwrap())))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.close();
        self.1.take().unwrap().join().unwrap();
    }
}

/// Tells of each call; reads the eventfd if it is to, and stays armed while it wants to.
struct Teller {
    fd: EventFd,
    reads: bool,
    stays: AtomicBool,
    calls: AtomicU32,
    told: Mutex<Sender<()>>,
}

impl Watcher for Teller {
    fn ready(&self) -> bool {
        if self.reads {
            self.fd.take();
        }
        self.calls.fetch_add(1, SeqCst);
        // The test may be over and its end of the channel gone.
        let _ = self.told.lock().unwrap().send(());
        self.stays.load(SeqCst)
    }
}

fn teller(reads: bool, stays: bool) -> (Arc<Teller>, Receiver<()>) {
    let (told, calls) = channel();
    let fd = EventFd::new().unwrap();
    let teller = Teller { fd, reads, stays: AtomicBool::new(stays), calls: AtomicU32::new(0), told: Mutex::new(told) };
    (Arc::new(teller), calls)
}

/// Until the loop has gone once around after everything that happened before.
fn settle(thread: &Arc<IoThread>) {
    for _ in 0..2 {
        let (teller, calls) = teller(true, true);
        let _watch = thread.watch(teller.fd.as_raw_fd(), teller.clone()).unwrap();
        teller.fd.signal();
        calls.recv_timeout(HANG).unwrap();
    }
}

#[test]
fn a_watcher_is_called_while_its_fd_is_readable() {
    let running = Running::new();
    let (teller, calls) = teller(false, true);
    let watch = running.0.watch(teller.fd.as_raw_fd(), teller.clone()).unwrap();
    settle(&running.0);
    assert_eq!(teller.calls.load(SeqCst), 0);
    teller.fd.signal();
    for _ in 0..3 {
        calls.recv_timeout(HANG).unwrap();
    }
    drop(watch);
}

#[test]
fn no_call_begins_while_disarmed() {
    let running = Running::new();
    let (teller, calls) = teller(true, true);
    let watch = running.0.watch(teller.fd.as_raw_fd(), teller.clone()).unwrap();
    watch.disarm();
    watch.disarm();
    teller.fd.signal();
    settle(&running.0);
    assert_eq!(teller.calls.load(SeqCst), 0);
    watch.arm().unwrap();
    watch.arm().unwrap();
    calls.recv_timeout(HANG).unwrap();
}

#[test]
fn a_watcher_that_returns_false_is_armed_by_hand() {
    let running = Running::new();
    let (teller, calls) = teller(false, false);
    let watch = running.0.watch(teller.fd.as_raw_fd(), teller.clone()).unwrap();
    teller.fd.signal();
    calls.recv_timeout(HANG).unwrap();
    settle(&running.0);
    assert_eq!(teller.calls.load(SeqCst), 1);
    watch.arm().unwrap();
    calls.recv_timeout(HANG).unwrap();
}

#[test]
fn a_watch_that_was_dropped_lets_its_watcher_go() {
    let running = Running::new();
    let (teller, calls) = teller(false, true);
    let watch = running.0.watch(teller.fd.as_raw_fd(), teller.clone()).unwrap();
    teller.fd.signal();
    calls.recv_timeout(HANG).unwrap();
    drop(watch);
    settle(&running.0);
    assert_eq!(Arc::strong_count(&teller), 1);
}

#[test]
fn a_watch_for_writing_is_armed_when_it_is_wanted() {
    let running = Running::new();
    let (teller, calls) = teller(false, false);
    let watch = running.0.watch_writable(teller.fd.as_raw_fd(), teller.clone()).unwrap();
    settle(&running.0);
    assert_eq!(teller.calls.load(SeqCst), 0);
    watch.arm().unwrap();
    calls.recv_timeout(HANG).unwrap();
}

#[test]
fn a_hangup_does_not_wake_who_is_disarmed() {
    let running = Running::new();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let (teller, calls) = teller(false, false);
    let watch = running.0.watch(ours.as_raw_fd(), teller.clone()).unwrap();
    watch.disarm();
    drop(theirs);
    settle(&running.0);
    assert_eq!(teller.calls.load(SeqCst), 0);
    watch.arm().unwrap();
    calls.recv_timeout(HANG).unwrap();
}

#[test]
fn what_epoll_refuses_is_an_error() {
    let thread = Arc::new(IoThread::new(0, 0, 0).unwrap());
    let (teller, _calls) = teller(true, true);
    assert_eq!(thread.watch(-1, teller.clone()).err().unwrap().raw_os_error(), Some(libc::EBADF));
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    assert_eq!(thread.watch(file.as_raw_fd(), teller).err().unwrap().raw_os_error(), Some(libc::EPERM));
}
