//! The notification protocol: who looks when, so that no kick and no interrupt is lost (virtio 1.3, 2.7.7, 2.7.10).
//!
//! Generic over the cells it shares with the driver, so that the loom model drives exactly this code.

use crate::sync::{fence, AtomicBool, AtomicU8, Condvar, EventFd, Mutex, Ordering};

/// `used.flags`: the driver need not kick.
pub const NO_NOTIFY: u16 = 1;
/// `avail.flags`: the device need not interrupt.
pub const NO_INTERRUPT: u16 = 1;

/// The words that driver and device share besides the rings' entries.
pub trait Cells {
    /// Acquire: the entries below it are visible.
    fn avail_idx(&self) -> u16;
    fn avail_flags(&self) -> u16;
    fn used_event(&self) -> u16;
    fn set_avail_event(&self, index: u16);
    fn set_used_flags(&self, flags: u16);
    /// Release: the entries below it are visible first.
    fn set_used_idx(&self, index: u16);
}

/// The avail index ran ahead by more entries than the ring has.
#[derive(Debug, PartialEq, Eq)]
pub struct Jump(pub u16);

/// Where the device stands in a split ring, and its half of the notification protocol.
pub struct Indexes<C> {
    pub cells: C,
    pub size: u16,
    pub event_idx: bool,
    pub notify_on_empty: bool,
    pub next_avail: u16,
    /// Entries written to the used ring, of which the driver knows those below `published`.
    pub next_used: u16,
    published: u16,
    /// The avail index up to which entries may be taken.
    seen: u16,
    /// The avail index the handler knows of: whatever comes later needs another look.
    looked: u16,
    /// The used index of the last interrupt decision; none after a start, so that the first decision signals.
    decided: Option<u16>,
}

impl<C: Cells> Indexes<C> {
    pub fn new(cells: C, size: u16, event_idx: bool, notify_on_empty: bool, next_avail: u16, next_used: u16) -> Self {
        Self {
            cells,
            size,
            event_idx,
            notify_on_empty,
            next_avail,
            next_used,
            published: next_used,
            seen: next_avail,
            looked: next_avail,
            decided: None,
        }
    }

    /// Ask for no kicks. With EVENT_IDX an avail event that is left behind is enough.
    pub fn suppress(&mut self) {
        if !self.event_idx {
            self.cells.set_used_flags(NO_NOTIFY);
        }
    }

    /// Ask for kicks again; true if something came meanwhile that will not be kicked for.
    pub fn rearm(&mut self) -> bool {
        if self.event_idx {
            self.cells.set_avail_event(self.looked);
        } else {
            self.cells.set_used_flags(0);
        }
        // The driver stores its index, then reads what we stored: one of the two must see the other's.
        #[cfg(not(lose_fence))]
        fence(Ordering::SeqCst);
        if cfg!(lose_last_look) {
            return false;
        }
        self.has_news()
    }

    /// Whether the driver added something since the handler last looked.
    pub fn has_news(&self) -> bool {
        self.cells.avail_idx() != self.looked
    }

    /// Look for work on behalf of the handler; true if there is some.
    pub fn look(&mut self) -> Result<bool, Jump> {
        self.refresh()?;
        self.looked = self.seen;
        Ok(self.seen != self.next_avail)
    }

    /// The avail entry to take next. `inside`: asked by the handler, which thereby learns how far the ring goes.
    pub fn take(&mut self, inside: bool) -> Result<Option<u16>, Jump> {
        if self.next_avail == self.seen {
            self.refresh()?;
            if inside {
                self.looked = self.seen;
            }
            if self.next_avail == self.seen {
                return Ok(None);
            }
        }
        let index = self.next_avail;
        self.next_avail = index.wrapping_add(1);
        Ok(Some(index))
    }

    fn refresh(&mut self) -> Result<(), Jump> {
        let avail = self.cells.avail_idx();
        let ahead = avail.wrapping_sub(self.next_avail);
        if ahead > self.size {
            return Err(Jump(ahead));
        }
        self.seen = avail;
        Ok(())
    }

    /// Make the used entries written so far known; `Some(whether to interrupt)` if there were any.
    pub fn publish(&mut self, idle: bool) -> Option<bool> {
        if self.published == self.next_used {
            return None;
        }
        self.cells.set_used_idx(self.next_used);
        self.published = self.next_used;
        // The driver stores its used event, then looks at the used index: one of the two must see the other's.
        #[cfg(not(lose_fence))]
        fence(Ordering::SeqCst);
        Some(self.decide(idle))
    }

    /// `idle`: nothing is in flight.
    fn decide(&mut self, idle: bool) -> bool {
        let (new, old) = (self.published, self.decided.replace(self.published));
        if self.notify_on_empty && idle && self.cells.avail_idx() == self.next_avail {
            return true;
        }
        if !self.event_idx {
            return self.cells.avail_flags() & NO_INTERRUPT == 0;
        }
        let event = self.cells.used_event();
        old.is_none_or(|old| new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }
}

/// What a doorbell serves: a queue, or the model of one.
pub trait Serve {
    /// Start a service: ask for no kicks, renew the budget.
    fn begin(&self);
    /// Let the handler run once, if there is work for it, and publish what it completed.
    fn pass(&self) -> Pass;
    /// Ask for kicks again; true if there is news.
    fn rearm(&self) -> bool;
}

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

    /// Serve until there is nothing left; true if the budget was used up first and the eventfd signalled for the rest.
    pub fn service(&self, queue: &impl Serve) -> bool {
        loop {
            match self.drain(queue) {
                Drained::Elsewhere => return false,
                Drained::Empty if !queue.rearm() => return false,
                Drained::Empty => (),
                Drained::Spent if self.attached() && self.passed_on() => return true,
                Drained::Spent => (),
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
            if self.entry.leave(end == Drained::Spent) {
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
