//! A virtqueue: takes chains from a ring, hands them to a handler and gives them back (virtio 1.3, 2.6).

mod desc;
pub mod doorbell;
mod inflight;
mod inflight_packed;
pub mod laps;
mod life;
#[cfg(all(test, loom))]
mod model;
#[cfg(all(test, loom))]
mod model_rings;
pub mod notify;
mod packed;
mod ring;
mod service;
mod split;
pub mod tap;

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use self::doorbell::{Doorbell, Drained};
pub use self::inflight::InflightRegion;
pub(crate) use self::ring::{Receipt, Used};
use self::service::{this_thread, Active, Served};
use self::tap::Tap;
use crate::chain::{Chain, Segment};
use crate::counters::Counters;
use crate::device_state::DeviceState;
use crate::dirty_log::{DirtyLog, QueueLog};
use crate::interrupt::Interrupt;
use crate::memory::GuestMemory;
use crate::sync::EventFd;
use crate::GuestError;

/// Serves a queue; never runs twice at once for one queue.
pub trait Handler: Send + Sync {
    /// Pop what you want and complete it, now or later. Taking nothing ends the service.
    fn handle(&self, vq: &Arc<VirtQueue>);
    /// What messages call it.
    fn name(&self) -> &str {
        "the handler"
    }
    /// Whether there is something to do besides what the driver added: the host has answered. Never blocks.
    fn has_news(&self) -> bool {
        false
    }
    /// Wait for what the host was asked for, and complete it: nobody will ask for news any more. Never within `handle`.
    fn finish(&self) {}
}

/// Where a ring lies and what the driver negotiated for it.
#[derive(Clone, Default)]
pub struct RingConfig {
    pub size: u16,
    pub desc: u64,
    /// The avail ring, or the driver event suppression structure of a packed ring.
    pub avail: u64,
    /// The used ring, or the device event suppression structure of a packed ring.
    pub used: u64,
    pub packed: bool,
    pub in_order: bool,
    pub event_idx: bool,
    pub indirect: bool,
    pub notify_on_empty: bool,
    /// Where to go on; in a packed ring bit 15 is the wrap counter, which is 1 at first.
    pub next_avail: u16,
    pub next_used: u16,
    /// Where to note which requests are in flight. If there are some already they are served first, and where to go on
    /// is derived from them.
    pub inflight: Option<InflightRegion>,
}

/// Looks at the ring whenever the queue has done something there.
pub type Watch = Box<dyn Fn() + Send + Sync>;

pub struct VirtQueue {
    state: Arc<DeviceState>,
    name: String,
    index: u16,
    max_size: u16,
    doorbell: Doorbell,
    /// The host signals it when it has answered, see `Handler::has_news`.
    answer: EventFd,
    active: Mutex<Option<Active>>,
    /// Counts the stops; a chain of an earlier run is stale. Changes only with the state's epoch held exclusively.
    run: AtomicU64,
    /// The thread that serves, by the address of a thread-local.
    server: AtomicUsize,
    interrupt: RwLock<Option<Interrupt>>,
    tap: Mutex<Option<Arc<dyn Tap>>>,
    /// Whether there is a tap, for those who have no lock.
    has_tap: AtomicBool,
    watch: OnceLock<Watch>,
    /// What the last handler is called: a chain may outlive it, and has to say whose it was.
    handler_name: Mutex<String>,
    pub counters: Counters,
}

impl VirtQueue {
    pub fn new(state: Arc<DeviceState>, name: String, index: u16, max_size: u16) -> std::io::Result<Self> {
        Ok(Self {
            state,
            name,
            index,
            max_size,
            doorbell: Doorbell::new(EventFd::new()?),
            answer: EventFd::new()?,
            active: Mutex::new(None),
            run: AtomicU64::new(0),
            server: AtomicUsize::new(0),
            interrupt: RwLock::new(None),
            tap: Mutex::new(None),
            has_tap: AtomicBool::new(false),
            watch: OnceLock::new(),
            handler_name: Mutex::new(String::from("the handler")),
            counters: Counters::default(),
        })
    }

    pub fn state(&self) -> &Arc<DeviceState> {
        &self.state
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn index(&self) -> u16 {
        self.index
    }

    pub fn max_size(&self) -> u16 {
        self.max_size
    }

    /// Entries of the ring, 0 while the queue is not started.
    pub fn size(&self) -> u16 {
        self.active().as_ref().map_or(0, |active| active.ring.size())
    }

    pub fn in_flight(&self) -> u16 {
        self.active().as_ref().map_or(0, |active| active.in_flight)
    }

    /// The next avail and used indexes, as `stop` returns them; none while the queue is not started.
    pub fn position(&self) -> Option<(u16, u16)> {
        self.active().as_ref().map(|active| active.ring.position())
    }

    pub(crate) fn run(&self) -> u64 {
        self.run.load(Ordering::Relaxed)
    }

    fn active(&self) -> MutexGuard<'_, Option<Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_interrupt(&self, interrupt: Option<Interrupt>) {
        *self.interrupt.write().unwrap_or_else(PoisonError::into_inner) = interrupt;
    }

    /// From now on mark what is written to guest memory. The used ring, where it is to be marked too, counts as lying at
    /// `used`. Until the next stop; nothing while the queue is not started.
    pub fn set_log(&self, log: Option<Arc<DirtyLog>>, used: Option<u64>) {
        if let Some(active) = self.active().as_mut() {
            let ring = used.map_or_else(Vec::new, |used| active.ring.written_at(used));
            active.log = log.map(|log| QueueLog { log, ring });
            active.mark_ring();
        }
    }

    /// Call `watch` from now on after each look at the ring, before anybody can complete what was taken, and after each
    /// publication. On the thread that does it, with nothing locked. False if there is such a thing already.
    pub fn watch(&self, watch: Watch) -> bool {
        self.watch.set(watch).is_ok()
    }

    /// Call the watch, also on behalf of who knows of more that is worth a look.
    pub fn looked(&self) {
        if let Some(watch) = self.watch.get() {
            watch();
        }
    }

    /// Take the next chain, if there is one. A malformed one breaks the device.
    pub fn pop(self: &Arc<Self>) -> Option<Chain> {
        let popped = self.try_pop();
        self.looked();
        match popped {
            Ok(chain) => chain,
            Err(error) => {
                self.fail(&error);
                None
            }
        }
    }

    fn try_pop(self: &Arc<Self>) -> Result<Option<Chain>, GuestError> {
        let inside = self.is_server();
        // Held throughout: a chain of a new ring must not get an old epoch. While a handler runs there is no new ring.
        let _unchanged = (!inside).then(|| self.state.shared());
        if self.state.is_broken() {
            return Ok(None);
        }
        let mut active = self.active();
        let Some(active) = active.as_mut() else {
            return Ok(None);
        };
        if self.doorbell.entry.is_awaited() {
            return Ok(None);
        }
        let Some((receipt, segments)) = active.take(inside)? else {
            return Ok(None);
        };
        self.counters.chains.add(1);
        Ok(Some(Chain::new(
            self.clone(),
            active.ring.memory().clone(),
            receipt,
            segments,
            self.state.epoch(),
            self.run(),
        )))
    }

    /// Give the chain that was taken last back to the ring, as if it had not been taken; several in the reverse order.
    ///
    /// For the handler while it is called: one that takes a chain before it knows whether it needs it. The budget stays
    /// spent, so a handler that ran out of it is called again. A stale chain is only dropped.
    pub fn unpop(&self, chain: Chain) {
        chain.untake(|receipt| {
            if let Some(active) = self.active().as_mut() {
                active.untake(receipt);
                self.counters.chains.take_back(1);
            }
        });
    }

    fn fail(&self, error: &GuestError) {
        self.state.fail(&format!("{}: {error}", self.name));
    }

    pub(crate) fn dropped(&self, head: u16) {
        let (name, who) = (&self.name, self.handler_name());
        self.state.fail(&format!("{name}: {who} dropped chain {head} without complete(); each has to be completed"));
    }

    /// Whether this thread is the one that serves the queue.
    pub fn is_server(&self) -> bool {
        self.server.load(Ordering::Relaxed) == this_thread()
    }

    /// Give a chain back: published at the end of the handler's call, or at once from any other thread. The caller keeps
    /// the epoch as it is, or a stop could come in between; without it `decided`, with the result, and `pass_late` follow.
    pub(crate) fn put(&self, used: Used, memory: &GuestMemory, writable: &[Segment]) -> Option<bool> {
        let mut active = self.active();
        let active = active.as_mut()?;
        if let Some(log) = &active.log {
            log.mark_written(memory, writable);
        }
        match &mut active.tapped {
            Some(tapped) => tapped.put(used, self.run()),
            None => active.put(used, self.state.is_broken()),
        }
        if self.is_server() {
            None
        } else {
            active.publish()
        }
    }

    /// Make known what has been completed so far, with one interrupt decision. Happens by itself at the end of a
    /// handler's call, and after a completion on any other thread.
    pub fn publish(&self) {
        if !self.pass_to_tap() {
            self.publish_ring();
        }
    }

    fn publish_ring(&self) {
        let decision = self.active().as_mut().and_then(Active::publish);
        self.decided(decision);
    }

    /// Act on the decision of a publication, if there was one. With nothing locked: a watch may be written in Python.
    pub(crate) fn decided(&self, interrupt: Option<bool>) {
        if interrupt.is_some() {
            self.looked();
        }
        match interrupt {
            None => (),
            Some(false) => self.counters.suppressed.add(1),
            Some(true) => self.interrupt(),
        }
    }

    /// Interrupt the driver, whatever it asked for: somebody else served the ring and has decided.
    pub fn interrupt(&self) {
        self.counters.interrupts.add(1);
        if let Some(interrupt) = &*self.interrupt.read().unwrap_or_else(PoisonError::into_inner) {
            interrupt.signal();
        }
    }

    /// Serve what is available, on this thread; true if the budget was used up and the eventfd signalled for the rest.
    pub fn service(self: &Arc<Self>) -> bool {
        self.doorbell.service(&Served(self))
    }

    /// A notify that reached userspace: serve it here, or signal the eventfd while that is attached.
    pub fn notify(self: &Arc<Self>) {
        self.counters.notifies.add(1);
        self.counters.own_kicks.add(u64::from(self.attached()));
        self.doorbell.notify(&Served(self));
    }

    pub fn attached(&self) -> bool {
        self.doorbell.attached()
    }

    /// From here on the eventfd carries the kicks; leaves it signalled.
    pub fn attach(&self) {
        self.counters.own_kicks.add(1);
        self.doorbell.attach();
    }

    /// From here on `notify` serves; serves a kick that is still in the eventfd.
    pub fn detach(self: &Arc<Self>) {
        let kicks = self.doorbell.detach(&Served(self));
        self.counters.kicks.add(kicks);
        self.finish();
    }

    /// Signal the eventfd as a kick does.
    pub fn signal(&self) {
        self.counters.own_kicks.add(1);
        self.doorbell.kick.signal();
    }

    pub fn kick_fd(&self) -> RawFd {
        self.doorbell.kick.as_raw_fd()
    }

    /// What a handler has the host signal. Its I/O thread waits for that, and nobody reads it.
    pub fn answer_fd(&self) -> RawFd {
        self.answer.as_raw_fd()
    }

    /// Count a kick that came through an fd of somebody else.
    pub fn count_kick(&self) {
        self.counters.kicks.add(1);
        self.counters.wakeups.add(1);
    }

    /// Clear the eventfd for the I/O thread; false if it was not signalled.
    pub fn take_kick(&self) -> bool {
        let kicks = self.doorbell.kick.take();
        self.counters.kicks.add(kicks);
        self.counters.wakeups.add(u64::from(kicks > 0));
        kicks > 0
    }

    /// What the I/O thread does when the eventfd is readable.
    pub fn on_kick(self: &Arc<Self>) {
        if self.take_kick() {
            self.service();
        }
    }

    /// Serve without asking for kicks again; false if the budget was used up. The caller must go on to `rearm`, or
    /// drain again, whatever happens in between: an I/O thread may spin on `has_work` there.
    pub fn drain(self: &Arc<Self>) -> bool {
        self.doorbell.drain(&Served(self)) != Drained::Spent
    }

    /// Whether the driver added something since the handler last looked, or the host answered. Leaves kicks suppressed.
    pub fn has_work(&self) -> bool {
        !self.state.is_broken() && self.active().as_ref().is_some_and(Active::has_news)
    }

    /// At how many places of the ring a kick was asked for since the start.
    pub fn asked(&self) -> u64 {
        self.active().as_ref().map_or(0, |active| active.ring.asked())
    }

    /// Ask for kicks again; true if something came meanwhile, which then is the caller's to drain.
    pub fn rearm(&self) -> bool {
        !self.state.is_broken() && self.active().as_mut().is_some_and(Active::rearm)
    }
}
