//! What wakes a queue besides its kicks: the file descriptor of its port is ready, and the queue waits for that.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::port::{Port, Refused};
use crate::iothread::IoThread;
use crate::queue::VirtQueue;
use crate::watch::{Watch, Watcher};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Send,
    Receive,
}

/// One direction of a port.
///
/// The fd is watched only while the handler said last that it waits for it: a receive queue without buffers and a
/// transmit queue that is not held up cost nothing.
pub struct Line {
    port: Arc<dyn Port>,
    direction: Direction,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    thread: Option<Arc<IoThread>>,
    vq: Option<Arc<VirtQueue>>,
    watch: Option<Watch>,
    /// What the handler said last, and how often it has said something.
    waits: bool,
    passes: u64,
}

impl Line {
    pub fn new(port: Arc<dyn Port>, direction: Direction) -> Arc<Self> {
        Arc::new(Self { port, direction, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the fd may be waited for, on this thread.
    pub fn open(&self, thread: Arc<IoThread>) {
        self.state().thread = Some(thread);
    }

    /// The driver is gone: wait for nothing, and hold nothing of its queue.
    pub fn close(&self) {
        let mut state = self.state();
        // It counts on: a call of the old watcher that is still under way must not take the new watch for its own.
        let passes = state.passes + 1;
        let closed = std::mem::replace(&mut *state, State { passes, ..State::default() });
        drop(state);
        drop(closed);
    }

    /// Where the handler stands at the end of a pass: it waits for the fd, or for a kick.
    pub fn settle(self: &Arc<Self>, vq: &Arc<VirtQueue>, waits: bool) -> io::Result<()> {
        let mut state = self.state();
        state.passes += 1;
        state.waits = waits;
        if state.vq.is_none() {
            state.vq = Some(vq.clone());
        }
        match (waits, &state.watch) {
            (false, _) => Ok(()),
            (true, Some(watch)) => watch.arm(),
            (true, None) => self.watch(&mut state, vq),
        }
    }

    fn watch(self: &Arc<Self>, state: &mut State, vq: &Arc<VirtQueue>) -> io::Result<()> {
        let Some(thread) = &state.thread else {
            return Ok(()); // closed meanwhile
        };
        let watcher = Arc::new(Awaited { line: self.clone(), vq: vq.clone() });
        let watch = match self.direction {
            Direction::Receive => thread.watch(self.port.fd(), watcher)?,
            Direction::Send => thread.watch_writable(self.port.fd(), watcher)?,
        };
        watch.arm()?;
        state.watch = Some(watch);
        Ok(())
    }

    /// Let the handler look again, although neither a kick nor a frame came.
    pub fn wake(&self) {
        let vq = self.state().vq.clone();
        match vq {
            Some(vq) if vq.attached() => vq.signal(),
            Some(vq) => drop(vq.service()),
            None => (),
        }
    }

    /// The fd is ready, and the handler was called if it has buffers: stop watching unless it waits still.
    fn rest(&self, passes: u64) {
        let state = self.state();
        if let (Some(watch), true) = (&state.watch, !state.waits || state.passes == passes) {
            watch.disarm();
        }
    }
}

/// Serves the queue when the fd of its line is ready.
struct Awaited {
    line: Arc<Line>,
    vq: Arc<VirtQueue>,
}

impl Watcher for Awaited {
    fn ready(&self) -> bool {
        if self.line.direction == Direction::Send && self.line.port.flush() == Err(Refused::Busy) {
            return true;
        }
        let passes = self.line.state().passes;
        if !self.vq.service() {
            self.line.rest(passes);
        }
        true
    }
}
