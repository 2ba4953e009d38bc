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
    /// The eventfd is about to be signalled for the rest.
    fn hand_over(&self) {}
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
    /// Another thread serves the queue, and will look once more.
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

    /// Serve the kicks that are still in the eventfd; returns how many those were.
    pub fn detach(&self, queue: &impl Serve) -> u64 {
        self.attached.store(false, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let kicks = if cfg!(lose_last_read) { 0 } else { self.kick.take() };
        if kicks > 0 {
            self.service(queue);
        }
        kicks
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
            if rounds >= ROUNDS && self.attached() {
                queue.hand_over();
                if self.passed_on() {
                    return true;
                }
            }
        }
    }

    /// Serve without asking for kicks again: the caller must go on to `rearm`, or to another drain.
    pub fn drain(&self, queue: &impl Serve) -> Drained {
        let Some(_inside) = self.entry.enter() else {
            return Drained::Elsewhere;
        };
        queue.begin();
        loop {
            match queue.pass() {
                Pass::Took => (),
                Pass::Idle => return Drained::Empty,
                Pass::Spent => return Drained::Spent,
            }
        }
    }
}

/// Lets one thread in at a time, without a lock.
///
/// Who finds it busy may go: the thread that is in looks at the ring once more after it has left.
pub struct Entry {
    busy: AtomicBool,
    waiting: AtomicU8,
    lock: Mutex<()>,
    left: Condvar,
}

impl Entry {
    fn new() -> Self {
        Self { busy: AtomicBool::new(false), waiting: AtomicU8::new(0), lock: Mutex::new(()), left: Condvar::new() }
    }

    fn enter(&self) -> Option<Inside<'_>> {
        (!self.busy.swap(true, Ordering::SeqCst)).then(|| Inside(self))
    }

    /// Wait until nobody is in, and keep everybody out.
    pub fn wait_and_enter(&self) -> Inside<'_> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut held = self.lock.lock();
        let inside = loop {
            if let Some(inside) = self.enter() {
                break inside;
            }
            held = match held {
                Ok(guard) => self.left.wait(guard),
                Err(poisoned) => self.left.wait(poisoned.into_inner()),
            };
        };
        drop(held);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        inside
    }

    /// Wait until nobody is in; from here on nothing is served until `release`, however often it is asked for. Who `is_in`
    /// does not wait for itself.
    pub fn hold(&self, is_in: bool) {
        let _inside = (!is_in).then(|| self.wait_and_enter());
        self.waiting.fetch_add(1, Ordering::SeqCst);
    }

    /// End a `hold`. Who was turned away is not called back.
    pub fn release(&self) {
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether somebody waits for the thread that is in to leave, or holds everybody off.
    pub fn is_awaited(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }
}

/// Being in; dropping it is leaving.
pub struct Inside<'a>(&'a Entry);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        // A swap and no store: what came before the swap of somebody who was turned away is visible from here on.
        self.0.busy.swap(false, Ordering::SeqCst);
        if self.0.is_awaited() {
            drop(self.0.lock.lock());
            self.0.left.notify_all();
        }
    }
}
