//! The loop of an I/O thread: waits for kicks, serves the queues, and looks a little longer before it sleeps.
//!
//! Waking up costs far more than a request, so after the last request the loop keeps looking for more for a
//! while, with kicks still switched off at the driver. How long is learnt: a kick that came soon after the loop
//! went to sleep would have been caught by looking longer, so the window grows; one that came later than the
//! longest window allowed would not, so the window shrinks and an idle thread costs nothing.

use std::collections::hash_map::{Entry, HashMap};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::queue::VirtQueue;
use crate::sync::{duplicate, EventFd};
use crate::watch::Watcher;

/// The first window that a growing one gets.
const FIRST_WINDOW_NS: u64 = 4000;
/// Looks at the rings between two looks at the other eventfds, which cost a system call.
const LOOKS_PER_POLL: u32 = 32;
const EVENTS_PER_WAIT: usize = 64;
const FOREVER: i32 = -1;

/// What an event of the epoll set is for.
enum Source {
    /// The queue's own eventfd, which is read.
    Own(Arc<VirtQueue>),
    /// An fd that somebody else's kicks signal. Theirs to read and to make blocking, so it is never read.
    Foreign(Arc<VirtQueue>),
    /// The host has answered what the queue's handler asked it. Never read either: there is no need.
    Answer(Arc<VirtQueue>),
    /// The fd of an armed watch.
    Watched(Arc<dyn Watcher>),
}

/// What an event asks the loop to do.
enum Work {
    Serve(Arc<VirtQueue>),
    Call(Arc<dyn Watcher>),
}

pub struct IoThread {
    epoll: Epoll,
    wake: EventFd,
    closed: AtomicBool,
    window: Window,
    /// The polled queues by eventfd, and the armed watches. Never locked while a queue is served or a watcher called.
    sources: Mutex<HashMap<RawFd, Source>>,
    /// Counts `remove`, so that the loop notices cheaply.
    removals: AtomicU64,
}

impl IoThread {
    /// `poll_grow` 0 means 2, `poll_shrink` 0 means back to no window at once.
    pub fn new(poll_max_ns: u64, poll_grow: u64, poll_shrink: u64) -> io::Result<Self> {
        let (epoll, wake) = (Epoll::new()?, EventFd::new()?);
        let window = Window { max_ns: AtomicU64::new(poll_max_ns), grow: poll_grow, shrink: poll_shrink };
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), readable(wake.as_raw_fd()))?;
        Ok(Self {
            epoll,
            wake,
            closed: AtomicBool::new(false),
            window,
            sources: Mutex::default(),
            removals: AtomicU64::new(0),
        })
    }

    pub fn poll_max_ns(&self) -> u64 {
        self.window.max_ns.load(Ordering::Relaxed)
    }

    pub fn set_poll_max_ns(&self, ns: u64) {
        self.window.max_ns.store(ns, Ordering::Relaxed);
    }

    fn sources(&self) -> MutexGuard<'_, HashMap<RawFd, Source>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, fd: RawFd, events: EventSet, source: Source) -> io::Result<()> {
        let mut sources = self.sources();
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, fd as u64))?;
        sources.insert(fd, source);
        Ok(())
    }

    /// False if it was not there.
    fn leave(&self, fd: RawFd) -> bool {
        let mut sources = self.sources();
        let was_there = sources.remove(&fd).is_some();
        if was_there {
            // By hand: the open file may live on elsewhere, and so would its place in the epoll set. It cannot fail: the
            // fd is open, and was added.
            let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
        was_there
    }

    /// Serve the queue whenever its eventfd is signalled, or the host answers it. Any thread.
    pub fn add(&self, vq: &Arc<VirtQueue>) -> io::Result<()> {
        self.enter(vq.kick_fd(), EventSet::IN, Source::Own(vq.clone()))?;
        self.enter(vq.answer_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED, Source::Answer(vq.clone()))
            .inspect_err(|_| self.remove(vq))
    }

    /// Serve the queue, which was added, also whenever `fd` is signalled; until the result is given to `remove_kick`.
    pub fn add_kick(&self, vq: &Arc<VirtQueue>, fd: RawFd) -> io::Result<OwnedFd> {
        let fd = duplicate(fd)?;
        self.enter(fd.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED, Source::Foreign(vq.clone()))?;
        Ok(fd)
    }

    /// Close an fd of `add_kick`.
    pub fn remove_kick(&self, fd: OwnedFd) {
        self.leave(fd.as_raw_fd());
        drop(fd);
    }

    /// Stop polling the queue. A service that runs already may go on; kicks are switched on again after it.
    pub fn remove(&self, vq: &Arc<VirtQueue>) {
        self.leave(vq.answer_fd());
        if self.leave(vq.kick_fd()) {
            self.removals.fetch_add(1, Ordering::SeqCst);
        }
    }

    pub(crate) fn arm(&self, fd: RawFd, events: EventSet, watcher: &Arc<dyn Watcher>) -> io::Result<()> {
        let mut sources = self.sources();
        if let Entry::Vacant(place) = sources.entry(fd) {
            self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, fd as u64))?;
            place.insert(Source::Watched(watcher.clone()));
        }
        Ok(())
    }

    /// Deletes the fd from the epoll set: one that waits for nothing would still be reported for a hangup.
    pub(crate) fn disarm(&self, fd: RawFd, watcher: &Arc<dyn Watcher>) {
        let mut sources = self.sources();
        if matches!(sources.get(&fd), Some(Source::Watched(armed)) if Arc::ptr_eq(armed, watcher)) {
            sources.remove(&fd);
            // It cannot fail: the fd is open as long as its watch, and was added.
            let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }

    /// Make `run` return soon. Any thread.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.wake.signal();
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Serve until `close`, on this thread.
    pub fn run(&self) -> io::Result<()> {
        let mut hot = Hot { thread: self, queues: Vec::new(), removals: 0 };
        let may_spin = usable_cpus() > 1;
        let mut window = 0;
        while !self.is_closed() {
            let idle_since = Instant::now();
            hot.wait(FOREVER)?;
            let idle = window + idle_since.elapsed().as_nanos() as u64;
            window = if may_spin { self.window.adapt(window, idle) } else { 0 };
            hot.serve(Duration::from_nanos(window))?;
        }
        Ok(())
    }
}

impl Source {
    /// What there is to do, if there is a kick to take or a watcher to call.
    fn work(&self) -> Option<Work> {
        match self {
            Self::Own(vq) => vq.take_kick().then(|| Work::Serve(vq.clone())),
            Self::Foreign(vq) => {
                vq.count_kick();
                Some(Work::Serve(vq.clone()))
            }
            Self::Answer(vq) => {
                vq.counters.answers.add(1);
                Some(Work::Serve(vq.clone()))
            }
            Self::Watched(watcher) => Some(Work::Call(watcher.clone())),
        }
    }
}

/// The queues that were kicked and whose kicks are switched off since; they leave through `rearm`.
struct Hot<'a> {
    thread: &'a IoThread,
    queues: Vec<Arc<VirtQueue>>,
    removals: u64,
}

impl Hot<'_> {
    /// Serve them, and what is kicked meanwhile, until for `window` nothing came.
    fn serve(&mut self, window: Duration) -> io::Result<()> {
        while !self.queues.is_empty() {
            self.drain()?;
            if self.thread.is_closed() {
                self.let_go(|_| false);
            } else if !self.spin(window)? {
                self.queues.retain(|vq| vq.rearm());
                if !self.queues.is_empty() {
                    // Others must not wait for a driver that always adds in time.
                    self.wait(0)?;
                }
            }
        }
        Ok(())
    }

    /// Serve each until it is empty. One with an endless supply does not keep the others waiting.
    fn drain(&mut self) -> io::Result<()> {
        loop {
            let spent = self.queues.iter().filter(|vq| !vq.drain()).count();
            self.release_removed();
            if spent == 0 || self.thread.is_closed() {
                return Ok(());
            }
            self.wait(0)?;
        }
    }

    /// Look for work for at most `window`; true if there is some.
    fn spin(&mut self, window: Duration) -> io::Result<bool> {
        if window.is_zero() {
            return Ok(false);
        }
        let start = Instant::now();
        while start.elapsed() < window {
            for _ in 0..LOOKS_PER_POLL {
                if self.queues.iter().any(|vq| vq.has_work()) {
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            if self.wait(0)? || self.thread.is_closed() {
                return Ok(true);
            }
            self.release_removed();
        }
        Ok(false)
    }

    /// Add the queues whose eventfd is signalled and call the watchers whose fd is ready; true if there are any.
    /// The timeout is in milliseconds.
    fn wait(&mut self, timeout: i32) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); EVENTS_PER_WAIT];
        let count = match self.thread.epoll.wait(timeout, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        for event in &events[..count] {
            // Removed since, or the kick was taken by a detach: both are legal. Taken under the lock: after a
            // `remove` the kick belongs to whoever polls the eventfd then.
            let work = self.thread.sources().get(&event.fd()).and_then(Source::work);
            match work {
                Some(Work::Serve(vq)) => self.add(vq),
                Some(Work::Call(watcher)) if !watcher.ready() => self.thread.disarm(event.fd(), &watcher),
                _ => (),
            }
        }
        Ok(count > 0)
    }

    fn add(&mut self, vq: Arc<VirtQueue>) {
        if !self.queues.iter().any(|hot| Arc::ptr_eq(hot, &vq)) {
            self.queues.push(vq);
        }
    }

    /// Let go of queues that are no longer polled, with their kicks switched on.
    fn release_removed(&mut self) {
        let removals = self.thread.removals.load(Ordering::SeqCst);
        if removals == self.removals {
            return;
        }
        self.removals = removals;
        let thread = self.thread;
        self.let_go(|vq| thread.sources().contains_key(&vq.kick_fd()));
    }

    /// Keep only some queues; the others are served until they are empty with kicks switched on.
    fn let_go(&mut self, keep: impl Fn(&VirtQueue) -> bool) {
        self.queues.retain(|vq| {
            let kept = keep(vq);
            if !kept {
                vq.service();
            }
            kept
        });
    }
}

/// How long to look for more work, in the terms of QEMU's iothread properties.
struct Window {
    max_ns: AtomicU64,
    grow: u64,
    shrink: u64,
}

impl Window {
    /// The next window after one of `window` ns was not enough: work came `idle` ns after the last.
    fn adapt(&self, window: u64, idle: u64) -> u64 {
        let max = self.max_ns.load(Ordering::Relaxed);
        let next = match (idle <= max, window, self.shrink) {
            (true, 0, _) => FIRST_WINDOW_NS,
            (true, _, _) => window.saturating_mul(if self.grow == 0 { 2 } else { self.grow }),
            (false, _, 0) => 0,
            (false, _, shrink) => window / shrink,
        };
        next.min(max)
    }
}

fn readable(fd: RawFd) -> EpollEvent {
    EpollEvent::new(EventSet::IN, fd as u64)
}

/// How many CPUs this thread may run on: with one, looking takes the time from whoever makes the work.
fn usable_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(grow: u64, shrink: u64) -> Window {
        Window { max_ns: AtomicU64::new(32768), grow, shrink }
    }

    #[test]
    fn the_window_grows_while_work_comes_within_the_longest() {
        let window = window(0, 0);
        let windows: Vec<u64> =
            std::iter::successors(Some(0), |now| Some(window.adapt(*now, 20_000))).take(6).collect();
        assert_eq!(windows, [0, 4000, 8000, 16000, 32000, 32768]);
        assert_eq!(self::window(3, 0).adapt(4000, 20_000), 12_000);
    }

    #[test]
    fn the_window_shrinks_when_no_window_would_have_been_long_enough() {
        assert_eq!(window(0, 0).adapt(32_768, 1_000_000), 0);
        assert_eq!(window(0, 4).adapt(32_768, 1_000_000), 8192);
    }

    #[test]
    fn a_maximum_of_zero_never_looks() {
        let window = Window { max_ns: AtomicU64::new(0), grow: 0, shrink: 0 };
        assert_eq!(window.adapt(0, 0), 0);
    }
}
