//! The notification protocol under every schedule that loom can think of: no kick and no interrupt is lost.
//!
//! Drives `notify` and `doorbell` as they are; only the shared cells, the eventfd and the driver are the model's.
//! `rust/core/loom.sh` runs it, and builds without a fence or without the last look, which must fail.

use loom::sync::{Arc, Mutex};
use loom::thread;

use super::doorbell::{Doorbell, Drained, Pass, Serve};
use super::notify::{Cells, Indexes, NO_NOTIFY};
use crate::sync::{fence, AtomicU16, EventFd, Ordering};

const SIZE: u16 = 4;

/// The words of a split ring without its entries.
#[derive(Default)]
struct Words {
    avail_idx: AtomicU16,
    used_event: AtomicU16,
    avail_event: AtomicU16,
    used_flags: AtomicU16,
    used_idx: AtomicU16,
}

impl Cells for Arc<Words> {
    fn avail_idx(&self) -> u16 {
        self.avail_idx.load(Ordering::Acquire)
    }

    fn avail_flags(&self) -> u16 {
        0
    }

    fn used_event(&self) -> u16 {
        self.used_event.load(Ordering::Relaxed)
    }

    fn set_avail_event(&self, index: u16) {
        self.avail_event.store(index, Ordering::Relaxed);
    }

    fn set_used_flags(&self, flags: u16) {
        self.used_flags.store(flags, Ordering::Relaxed);
    }

    fn set_used_idx(&self, index: u16) {
        self.used_idx.store(index, Ordering::Release);
    }
}

/// A queue whose handler completes whatever there is.
struct Queue {
    doorbell: Doorbell,
    indexes: Mutex<Indexes<Arc<Words>>>,
    interrupt: EventFd,
}

impl Serve for Queue {
    fn begin(&self) {
        self.indexes.lock().unwrap().suppress();
    }

    fn pass(&self) -> Pass {
        let mut indexes = self.indexes.lock().unwrap();
        if !indexes.look().unwrap() {
            return Pass::Idle;
        }
        while indexes.take(true).unwrap().is_some() {
            indexes.next_used = indexes.next_used.wrapping_add(1);
        }
        if indexes.publish(true) == Some(true) {
            self.interrupt.signal();
        }
        Pass::Took
    }

    fn rearm(&self) -> bool {
        self.indexes.lock().unwrap().rearm()
    }
}

impl Queue {
    fn served(&self) -> u16 {
        self.indexes.lock().unwrap().next_avail
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
            let more = self.indexes.lock().unwrap().has_news();
            if !more && !self.rearm() {
                return;
            }
        }
    }
}

/// The driver's half, as Linux has it.
struct Driver {
    words: Arc<Words>,
    event_idx: bool,
    added: u16,
}

impl Driver {
    /// Make one chain available and kick if the device asks for it.
    fn add(&mut self, kick: impl FnOnce()) {
        self.added += 1;
        self.words.avail_idx.store(self.added, Ordering::Release);
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            self.words.avail_event.load(Ordering::Relaxed) == self.added - 1
        } else {
            self.words.used_flags.load(Ordering::Relaxed) & NO_NOTIFY == 0
        };
        if wanted {
            kick();
        }
    }

    /// Ask for an interrupt at the next used entry; return how many there are already.
    fn await_used(&self, seen: u16) -> u16 {
        self.words.used_event.store(seen, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.words.used_idx.load(Ordering::Acquire)
    }
}

fn queue_and_driver(event_idx: bool) -> (Arc<Queue>, Driver) {
    let words = Arc::new(Words::default());
    let indexes = Mutex::new(Indexes::new(words.clone(), SIZE, event_idx, false, 0, 0));
    let doorbell = Doorbell::new(EventFd::new().unwrap());
    let queue = Queue { doorbell, indexes, interrupt: EventFd::new().unwrap() };
    (Arc::new(queue), Driver { words, event_idx, added: 0 })
}

fn explore(preemptions: usize, scenario: impl Fn(bool) + Send + Sync + Copy + 'static) {
    for event_idx in [false, true] {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(preemptions);
        model.check(move || scenario(event_idx));
    }
}

/// A driver adds and kicks twice; `serve` is what the I/O thread does, at any time.
fn a_kick_arrives(event_idx: bool, serve: fn(&Queue)) {
    let (queue, mut driver) = queue_and_driver(event_idx);
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
    assert_eq!(queue.served(), driver.added);
}

#[test]
fn no_kick_is_lost_between_drain_and_rearm() {
    explore(3, |event_idx| a_kick_arrives(event_idx, Queue::on_kick));
}

#[test]
fn no_kick_is_lost_while_looking_longer() {
    explore(3, |event_idx| a_kick_arrives(event_idx, Queue::on_kick_looking_longer));
}

#[test]
fn no_kick_is_lost_when_two_vcpus_serve() {
    explore(3, |event_idx| {
        let (queue, mut driver) = queue_and_driver(event_idx);
        let other = queue.clone();
        let other = thread::spawn(move || other.doorbell.notify(&*other));
        driver.add(|| queue.doorbell.notify(&*queue));
        driver.add(|| queue.doorbell.notify(&*queue));
        other.join().unwrap();
        assert_eq!(queue.served(), driver.added);
    });
}

#[test]
fn no_interrupt_is_lost() {
    explore(3, |event_idx| {
        let (queue, mut driver) = queue_and_driver(event_idx);
        // The first decision signals in any case; what follows is decided by the used event.
        driver.add(|| queue.doorbell.notify(&*queue));
        queue.interrupt.take();
        let server = queue.clone();
        driver.add(|| ());
        let server = thread::spawn(move || server.doorbell.service(&*server));
        let seen = driver.await_used(1);
        server.join().unwrap();
        assert!(seen == 2 || queue.interrupt.take() > 0);
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
fn while_kicking(event_idx: bool, assigned: bool, flip: fn(&Queue, &Register)) -> (Arc<Queue>, Driver) {
    let (queue, mut driver) = queue_and_driver(event_idx);
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
    explore(2, |event_idx| {
        let (queue, driver) = while_kicking(event_idx, true, |queue, register| {
            register.assign(false);
            queue.doorbell.detach(queue);
        });
        assert_eq!(queue.served(), driver.added);
    });
}

#[test]
fn no_kick_is_lost_when_the_eventfd_is_attached() {
    explore(2, |event_idx| {
        let (queue, driver) = while_kicking(event_idx, false, |queue, register| {
            queue.doorbell.attach();
            register.assign(true);
        });
        queue.on_kick();
        assert_eq!(queue.served(), driver.added);
    });
}

#[test]
fn a_notify_that_races_with_detach_is_not_lost() {
    explore(3, |event_idx| {
        let (queue, mut driver) = queue_and_driver(event_idx);
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
        assert_eq!(queue.served(), driver.added);
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

fn no_kick_is_lost_in_a_hand_over(event_idx: bool, from: Taker, to: Taker) {
    let (queue, mut driver) = queue_and_driver(event_idx);
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
    assert_eq!(queue.served(), driver.added);
}

#[test]
fn no_kick_is_lost_when_vhost_grabs_the_eventfd() {
    explore(2, |event_idx| no_kick_is_lost_in_a_hand_over(event_idx, Taker::IoThread, Taker::Vhost));
}

#[test]
fn no_kick_is_lost_when_vhost_releases_the_eventfd() {
    explore(2, |event_idx| no_kick_is_lost_in_a_hand_over(event_idx, Taker::Vhost, Taker::IoThread));
}
