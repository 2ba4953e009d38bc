//! Who serves a kick, and when: attach, detach, notify, and the one thread that is let in.
//!
//! Generic over what is served, so that the loom model drives exactly this code.

use crate::sync::{fence, AtomicBool, AtomicU8, Condvar, EventFd, Mutex, Ordering};

/// What a doorbell serves: a queue, or the model of one.
pub trait Serve {
    /// Start a service: ask for no kicks, renew the budget.
    fn begin(&self);
    /// Let the handler run once, if there is work for it, and publish what it completed.
    fn pass(&self) -> Pass;
    /// Ask for kicks again; true if there is news.
    fn rearm(&self) -> bool;
}

/// Times a service looks again, for a driver that keeps adding while it is being served.
const ROUNDS: u32 = 16;

/// How a pass ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// There was nothing, or nothing the handler wanted.
    Idle,
    /// Chains were taken; look again.
    Took,
    /// Chains were taken and the budget is used up.
    Spent,
}

/// How a drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Another thread serves the queue and will look once more.
    Elsewhere,
    Empty,
    /// The budget is used up; there may be more.
    Spent,
}

/// The eventfd of a queue and who serves its kicks: while attached, whoever polls the eventfd; else who notifies.
pub struct Doorbell {
    pub kick: EventFd,
    attached: AtomicBool,
    pub entry: Entry,
}

impl Doorbell {
    pub fn new(kick: EventFd) -> Self {
        Self { kick, attached: AtomicBool::new(false), entry: Entry::new() }
    }

    pub fn attached(&self) -> bool {
        self.attached.load(Ordering::SeqCst)
    }

    /// A notify that reached userspace.
    pub fn notify(&self, queue: &impl Serve) {
        if !self.attached() || !self.passed_on() {
            self.service(queue);
        }
    }

    /// Signal the eventfd; false if a detach came in between, had its last look before and left the kick to us.
    fn passed_on(&self) -> bool {
        self.kick.signal();
        fence(Ordering::SeqCst);
        self.attached() || self.kick.take() == 0
    }

    pub fn attach(&self) {
        self.attached.store(true, Ordering::SeqCst);
        self.kick.signal();
    }

    pub fn detach(&self, queue: &impl Serve) {
        self.attached.store(false, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if self.kick.take() > 0 {
            self.service(queue);
        }
    }

    /// Serve until there is nothing left. True: the thread was held long enough, and the eventfd is signalled for
    /// the rest; that needs somebody who polls it.
    pub fn service(&self, queue: &impl Serve) -> bool {
        let mut rounds = 0;
        loop {
            match self.drain(queue) {
                Drained::Elsewhere => return false,
                Drained::Empty if !queue.rearm() || self.entry.is_awaited() => return false,
                Drained::Empty => rounds += 1,
                Drained::Spent => rounds = ROUNDS,
            }
            if rounds >= ROUNDS && self.attached() && self.passed_on() {
                return true;
            }
        }
    }

    /// Serve without asking for kicks again: the caller must go on to `rearm`, or to another drain.
    pub fn drain(&self, queue: &impl Serve) -> Drained {
        if !self.entry.enter() {
            return Drained::Elsewhere;
        }
        loop {
            self.entry.begin();
            queue.begin();
            let end = loop {
                match queue.pass() {
                    Pass::Took => (),
                    Pass::Idle => break Drained::Empty,
                    Pass::Spent => break Drained::Spent,
                }
            };
            if self.entry.leave(end == Drained::Spent || self.entry.is_awaited()) {
                return end;
            }
        }
    }
}

const IDLE: u8 = 0;
const RUNNING: u8 = 1;
const AGAIN: u8 = 2;

/// Lets one thread in at a time, without a lock: who comes second leaves a mark, and the first looks once more.
pub struct Entry {
    state: AtomicU8,
    waiting: AtomicU8,
    lock: Mutex<()>,
    left: Condvar,
}

impl Entry {
    fn new() -> Self {
        Self { state: AtomicU8::new(IDLE), waiting: AtomicU8::new(0), lock: Mutex::new(()), left: Condvar::new() }
    }

    /// True: this thread is in. False: the thread that is in has been told to look again.
    fn enter(&self) -> bool {
        self.state.swap(AGAIN, Ordering::SeqCst) == IDLE
    }

    /// Forget the marks so far: what they were for will be seen now.
    fn begin(&self) {
        self.state.swap(RUNNING, Ordering::SeqCst);
    }

    /// False if somebody left a mark and `regardless` is not set: then this thread is still in.
    fn leave(&self, regardless: bool) -> bool {
        let marked = self.state.compare_exchange(RUNNING, IDLE, Ordering::SeqCst, Ordering::SeqCst).is_err();
        if marked && !regardless {
            return false;
        }
        if marked {
            self.state.swap(IDLE, Ordering::SeqCst);
        }
        self.wake();
        true
    }

    fn wake(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            drop(self.lock.lock());
            self.left.notify_all();
        }
    }

    /// Wait until nobody is in, and keep everybody out until `exit`.
    pub fn wait_and_enter(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut held = self.lock.lock();
        while self.state.compare_exchange(IDLE, RUNNING, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            held = match held {
                Ok(guard) => self.left.wait(guard),
                Err(poisoned) => self.left.wait(poisoned.into_inner()),
            };
        }
        drop(held);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }

    pub fn exit(&self) {
        self.leave(true);
    }

    /// Whether somebody waits for the thread that is in to leave.
    pub fn is_awaited(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }
}
