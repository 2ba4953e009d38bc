//! Serving a queue: one pass of its handler after another, each published as one batch.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use super::doorbell::{Pass, Serve};
use super::ring::{Order, Receipt, Ring, Used};
use super::tap::Tapped;
use super::{Handler, VirtQueue};
use crate::chain::Segments;
use crate::dirty_log::QueueLog;
use crate::GuestError;

/// Chains one service takes at most before it lets others have the thread.
const BUDGET: u32 = 256;

/// What a queue has while it is started.
pub(super) struct Active {
    pub ring: Ring,
    /// Chains that the driver has not got back.
    pub in_flight: u16,
    /// With IN_ORDER: what was completed too early is held back.
    order: Option<Order>,
    pub tapped: Option<Tapped>,
    /// Where to mark what is written to guest memory.
    pub log: Option<QueueLog>,
    pub handler: Arc<dyn Handler>,
    /// Chains the handler may still take in this service, and those it took in this pass.
    budget: u32,
    taken: u32,
}

impl Active {
    pub fn new(ring: Ring, in_order: bool, handler: Arc<dyn Handler>, tapped: Option<Tapped>) -> Self {
        let order = in_order.then(Order::default);
        Self { ring, handler, order, tapped, in_flight: 0, log: None, budget: BUDGET, taken: 0 }
    }

    /// The next chain's receipt and segments. `inside`: taken by the handler while it is being called.
    pub fn take(&mut self, inside: bool) -> Result<Option<(Receipt, Segments)>, GuestError> {
        if inside && self.budget == 0 {
            return Ok(None);
        }
        let size = self.ring.size();
        let Some((mut receipt, segments)) = self.ring.take(inside)? else {
            return Ok(None);
        };
        if self.in_flight == size {
            return Err(GuestError(format!("more chains in flight than the queue has entries ({size})")));
        }
        self.in_flight += 1;
        if let Some(order) = &mut self.order {
            receipt.ticket = order.take();
        }
        if inside {
            self.budget -= 1;
            self.taken += 1;
        }
        Ok(Some((receipt, segments)))
    }

    /// The chain that was taken last was not needed.
    pub fn untake(&mut self, receipt: Receipt) {
        self.ring.untake(receipt);
        self.in_flight = self.in_flight.saturating_sub(1);
        self.taken = self.taken.saturating_sub(1);
        if let Some(order) = &mut self.order {
            order.untake();
        }
    }

    /// A chain was completed: into the ring with it, if it is its turn and the device is not `broken`.
    pub fn put(&mut self, used: Used, broken: bool) {
        let Some(mut order) = self.order.take() else {
            self.give_back(used, broken);
            return;
        };
        order.put(used);
        while let Some(used) = order.next() {
            self.give_back(used, broken);
        }
        self.order = Some(order);
    }

    fn give_back(&mut self, used: Used, broken: bool) {
        self.in_flight = self.in_flight.saturating_sub(1);
        if !broken {
            self.ring.put(used);
        }
    }

    /// Ask for kicks again; true if something came meanwhile.
    pub fn rearm(&mut self) -> bool {
        let news = self.ring.rearm();
        self.mark_ring();
        news || self.handler.has_news()
    }

    pub fn has_news(&self) -> bool {
        self.ring.has_news() || self.handler.has_news()
    }

    pub fn mark_ring(&self) {
        if let Some(log) = &self.log {
            log.mark_ring();
        }
    }

    /// Make known what was completed; whether to interrupt, if there was something.
    pub fn publish(&mut self) -> Option<bool> {
        let decision = self.ring.publish(self.in_flight == 0)?;
        if let Some(log) = &self.log {
            log.mark_ring();
            log.tell();
        }
        Some(decision)
    }
}

thread_local! {
    static HERE: u8 = const { 0 };
}

/// Tells threads apart, more cheaply than their ids.
pub(super) fn this_thread() -> usize {
    HERE.with(|here| std::ptr::from_ref(here) as usize)
}

/// A queue as its doorbell sees it.
pub(super) struct Served<'a>(pub &'a Arc<VirtQueue>);

impl Serve for Served<'_> {
    fn begin(&self) {
        self.0.server.store(this_thread(), Ordering::Relaxed);
        if let Some(active) = self.0.active().as_mut() {
            active.budget = BUDGET;
            active.ring.suppress();
            active.mark_ring();
        }
    }

    fn pass(&self) -> Pass {
        let pass = self.0.pass();
        if pass != Pass::Took {
            // Before the entry is left: afterwards another thread may be the server.
            self.0.server.store(0, Ordering::Relaxed);
        }
        pass
    }

    fn rearm(&self) -> bool {
        self.0.rearm()
    }

    fn hand_over(&self) {
        self.0.counters.own_kicks.add(1);
    }
}

impl VirtQueue {
    fn pass(self: &Arc<Self>) -> Pass {
        let work = self.work();
        self.looked();
        let handler = match work {
            Ok(Some(handler)) => handler,
            Ok(None) => return Pass::Idle,
            Err(error) => {
                self.fail(&error);
                return Pass::Idle;
            }
        };
        handler.handle(self);
        self.publish();
        let (pass, was_exchanged) = self.ended(&handler);
        if was_exchanged {
            // `set_handler` asked for it too early, if this handler had not begun.
            handler.finish();
            self.publish();
        }
        pass
    }

    /// How the pass of a handler ended, and whether another one serves from now on.
    fn ended(&self, handler: &Arc<dyn Handler>) -> (Pass, bool) {
        let active = self.active();
        let Some(active) = active.as_ref() else {
            return (Pass::Idle, false);
        };
        let pass = match active {
            Active { budget: 0, .. } => Pass::Spent,
            Active { taken: 0, .. } => Pass::Idle,
            _ => Pass::Took,
        };
        (pass, !Arc::ptr_eq(&active.handler, handler))
    }

    /// The handler, if there is work for it.
    fn work(&self) -> Result<Option<Arc<dyn Handler>>, GuestError> {
        let mut active = self.active();
        let Some(active) = active.as_mut() else {
            return Ok(None);
        };
        if self.state.is_broken() || self.doorbell.entry.is_awaited() {
            return Ok(None);
        }
        let added = active.ring.look()?;
        if !added && !active.handler.has_news() {
            return Ok(None);
        }
        active.taken = 0;
        Ok(Some(active.handler.clone()))
    }
}
