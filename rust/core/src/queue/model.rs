//! The notification protocol under every schedule that loom can think of: no kick and no interrupt is lost.
//!
//! Drives `notify` and `doorbell` as they are; only the shared cells, the eventfd and the driver are the model's.
//! `rust/core/loom.sh` runs it, and builds without a fence or without the last look, which must fail.

use loom::sync::{Arc, Mutex};
use loom::thread;

use super::doorbell::{Doorbell, Drained, Pass, Serve};
use super::model_rings::{Driver, Kind, Ring};
use crate::sync::EventFd;

/// A queue whose handler completes whatever there is.
struct Queue {
    doorbell: Doorbell,
    ring: Mutex<Ring>,
    interrupt: EventFd,
}

impl Serve for Queue {
    fn begin(&self) {
        self.ring.lock().unwrap().suppress();
    }

    fn pass(&self) -> Pass {
        let mut ring = self.ring.lock().unwrap();
        if !ring.look() {
            return Pass::Idle;
        }
        ring.complete_all();
        if ring.publish() == Some(true) {
            self.interrupt.signal();
        }
        Pass::Took
    }

    fn rearm(&self) -> bool {
        self.ring.lock().unwrap().rearm()
    }
}

impl Queue {
    fn served(&self) -> u16 {
        self.ring.lock().unwrap().served()
    }

    /// What an I/O thread does when it finds the eventfd readable.
    fn on_kick(&self) {
        if self.doorbell.kick.take() > 0 {
            self.doorbell.service(self);
        }
    }

    /// The same with the look for more work between the drain and the rearm.
    fn on_kick_looking_longer(&self) {
        if self.doorbell.kick.take() == 0 {
            return;
        }
        loop {
            assert_ne!(self.doorbell.drain(self), Drained::Spent);
            let more = self.ring.lock().unwrap().has_news();
            if !more && !self.rearm() {
                return;
            }
        }
    }
}

fn queue_and_driver(kind: Kind) -> (Arc<Queue>, Driver) {
    let (ring, driver) = kind.ring_and_driver();
    let doorbell = Doorbell::new(EventFd::new().unwrap());
    let queue = Queue { doorbell, ring: Mutex::new(ring), interrupt: EventFd::new().unwrap() };
    (Arc::new(queue), driver)
}

/// Every schedule of a scenario, for both rings or for the one that the environment's `RING` names.
fn explore(preemptions: usize, scenario: impl Fn(Kind) + Send + Sync + Copy + 'static) {
    let only = std::env::var("RING").ok();
    for (packed, event_idx) in [(false, false), (false, true), (true, false), (true, true)] {
        if only.as_deref().is_some_and(|ring| ring != if packed { "packed" } else { "split" }) {
            continue;
        }
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(preemptions);
        model.check(move || scenario(Kind { packed, event_idx }));
    }
}

/// A driver adds and kicks twice; `serve` is what the I/O thread does, at any time.
fn a_kick_arrives(kind: Kind, serve: fn(&Queue)) {
    let (queue, mut driver) = queue_and_driver(kind);
    queue.doorbell.attach();
    let server = queue.clone();
    let server = thread::spawn(move || {
        serve(&server);
        serve(&server);
    });
    driver.add(|| queue.doorbell.kick.signal());
    driver.add(|| queue.doorbell.kick.signal());
    server.join().unwrap();
    // Whatever is not served yet has a kick on its way.
    serve(&queue);
    assert_eq!(queue.served(), driver.added());
}

#[test]
fn no_kick_is_lost_between_drain_and_rearm() {
    explore(3, |kind| a_kick_arrives(kind, Queue::on_kick));
}

#[test]
fn no_kick_is_lost_while_looking_longer() {
    explore(3, |kind| a_kick_arrives(kind, Queue::on_kick_looking_longer));
}

#[test]
fn no_kick_is_lost_when_two_vcpus_serve() {
    explore(3, |kind| {
        let (queue, mut driver) = queue_and_driver(kind);
        let other = queue.clone();
        let other = thread::spawn(move || other.doorbell.notify(&*other));
        driver.add(|| queue.doorbell.notify(&*queue));
        driver.add(|| queue.doorbell.notify(&*queue));
        other.join().unwrap();
        assert_eq!(queue.served(), driver.added());
    });
}

#[test]
fn no_interrupt_is_lost() {
    explore(3, |kind| {
        let (queue, mut driver) = queue_and_driver(kind);
        // The first decision signals in any case; what follows is decided by the used event.
        driver.add(|| queue.doorbell.notify(&*queue));
        queue.interrupt.take();
        driver.add(|| ());
        // The driver and not the service in the other thread: loom forgets a load that another one followed.
        let guest = thread::spawn(move || driver.await_used(1));
        queue.doorbell.service(&*queue);
        let seen = guest.join().unwrap();
        assert!(seen == 2 || queue.interrupt.take() > 0);
    });
}

#[test]
fn a_batch_is_seen_whole_or_not_at_all() {
    explore(3, |kind| {
        let (queue, mut driver) = queue_and_driver(kind);
        driver.add(|| ());
        driver.add(|| ());
        let guest = thread::spawn(move || driver.used());
        queue.doorbell.service(&*queue);
        let seen = guest.join().unwrap();
        assert!(seen == 0 || seen == 2);
    });
}

/// Where the guest's write to the notify register ends: KVM's table of ioeventfds, or an exit.
struct Register {
    assigned: Mutex<bool>,
}

impl Register {
    fn write(&self, queue: &Queue) {
        // KVM's removal waits for writes that are under way, as this lock does.
        let assigned = self.assigned.lock().unwrap();
        if *assigned {
            queue.doorbell.kick.signal();
        } else {
            drop(assigned);
            queue.doorbell.notify(queue);
        }
    }

    fn assign(&self, assigned: bool) {
        *self.assigned.lock().unwrap() = assigned;
    }
}

/// The driver adds twice while `flip` runs and an I/O thread serves; both are over when this returns.
fn while_kicking(kind: Kind, assigned: bool, flip: fn(&Queue, &Register)) -> (Arc<Queue>, Driver) {
    let (queue, mut driver) = queue_and_driver(kind);
    let register = Arc::new(Register { assigned: Mutex::new(assigned) });
    if assigned {
        queue.doorbell.attach();
    }
    let (server, guest, written) = (queue.clone(), queue.clone(), register.clone());
    let server = thread::spawn(move || server.on_kick());
    let guest = thread::spawn(move || {
        driver.add(|| written.write(&guest));
        driver.add(|| written.write(&guest));
        driver
    });
    flip(&queue, &register);
    server.join().unwrap();
    (queue, guest.join().unwrap())
}

#[test]
fn no_kick_is_lost_when_the_eventfd_is_detached() {
    explore(2, |kind| {
        let (queue, driver) = while_kicking(kind, true, |queue, register| {
            register.assign(false);
            queue.doorbell.detach(queue);
        });
        assert_eq!(queue.served(), driver.added());
    });
}

#[test]
fn no_kick_is_lost_when_the_eventfd_is_attached() {
    explore(2, |kind| {
        let (queue, driver) = while_kicking(kind, false, |queue, register| {
            queue.doorbell.attach();
            register.assign(true);
        });
        queue.on_kick();
        assert_eq!(queue.served(), driver.added());
    });
}

#[test]
fn a_notify_that_races_with_detach_is_not_lost() {
    explore(3, |kind| {
        let (queue, mut driver) = queue_and_driver(kind);
        queue.doorbell.attach();
        let guest = queue.clone();
        // An exit that happens although the eventfd is attached, as through the PCI_CFG window.
        let guest = thread::spawn(move || {
            driver.add(|| guest.doorbell.notify(&*guest));
            driver.add(|| guest.doorbell.notify(&*guest));
            driver
        });
        queue.doorbell.detach(&*queue);
        let driver = guest.join().unwrap();
        assert_eq!(queue.served(), driver.added());
    });
}

/// Who may take the eventfd: the I/O thread while it polls the queue, or vhost while it is lent.
#[derive(Clone, Copy, PartialEq)]
enum Taker {
    IoThread,
    Vhost,
}

/// Take the eventfd and serve, if it is this one's turn. A loop looks at its table and takes under one lock.
fn take_turn(queue: &Queue, taker: &Mutex<Taker>, who: Taker) {
    let kicked = {
        let taker = taker.lock().unwrap();
        *taker == who && queue.doorbell.kick.take() > 0
    };
    if kicked {
        queue.doorbell.service(queue);
    }
}

/// Whoever gets the eventfd finds it signalled: what the other one took may not be served yet.
fn hand_over(queue: &Queue, taker: &Mutex<Taker>, to: Taker) {
    *taker.lock().unwrap() = to;
    queue.doorbell.kick.signal();
}

fn no_kick_is_lost_in_a_hand_over(kind: Kind, from: Taker, to: Taker) {
    let (queue, mut driver) = queue_and_driver(kind);
    queue.doorbell.attach();
    let taker = Arc::new(Mutex::new(from));
    let (guest, server, turn) = (queue.clone(), queue.clone(), taker.clone());
    let server = thread::spawn(move || take_turn(&server, &turn, from));
    let guest = thread::spawn(move || {
        driver.add(|| guest.doorbell.kick.signal());
        driver.add(|| guest.doorbell.notify(&*guest));
        driver
    });
    hand_over(&queue, &taker, to);
    take_turn(&queue, &taker, to);
    server.join().unwrap();
    let driver = guest.join().unwrap();
    assert!(queue.doorbell.attached());
    take_turn(&queue, &taker, to);
    assert_eq!(queue.served(), driver.added());
}

#[test]
fn no_kick_is_lost_when_vhost_grabs_the_eventfd() {
    explore(2, |kind| no_kick_is_lost_in_a_hand_over(kind, Taker::IoThread, Taker::Vhost));
}

#[test]
fn no_kick_is_lost_when_vhost_releases_the_eventfd() {
    explore(2, |kind| no_kick_is_lost_in_a_hand_over(kind, Taker::Vhost, Taker::IoThread));
}
