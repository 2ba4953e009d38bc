//! `VirtQueue`.

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyDict};
use pyvirtio_core::interrupt::ISR_QUEUE;
use pyvirtio_core::{Interrupt, RingConfig, Tap};

use crate::chain::Chain;
use crate::device_state::DeviceState;
use crate::dirty_log::DirtyLog;
use crate::errors::{guest_error, os_error};
use crate::handler::handler;
use crate::inflight::InflightRegion;
use crate::interrupt::{interrupt, CallFd, Isr, MsixVector};
use crate::logging;
use crate::memory::GuestMemory;
use crate::tap::{Completed, PythonTap};

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct VirtQueue {
    pub inner: Arc<pyvirtio_core::VirtQueue>,
    /// What `start` was given, for who watches.
    ring: Arc<Mutex<Option<Py<PyDict>>>>,
}

impl VirtQueue {
    fn remember(&self, memory: &Bound<'_, GuestMemory>, config: &RingConfig) -> PyResult<()> {
        let ring = PyDict::new(memory.py());
        ring.set_item("memory", memory)?;
        ring.set_item("size", config.size)?;
        ring.set_item("desc", config.desc)?;
        ring.set_item("avail", config.avail)?;
        ring.set_item("used", config.used)?;
        ring.set_item("packed", config.packed)?;
        ring.set_item("in_order", config.in_order)?;
        ring.set_item("event_idx", config.event_idx)?;
        ring.set_item("indirect", config.indirect)?;
        ring.set_item("notify_on_empty", config.notify_on_empty)?;
        ring.set_item("next_avail", config.next_avail)?;
        ring.set_item("next_used", config.next_used)?;
        *self.ring.lock().unwrap_or_else(PoisonError::into_inner) = Some(ring.unbind());
        Ok(())
    }
}

/// Call Python with the ring that is in use. What goes wrong there is logged, and nothing more.
fn look(callback: &Py<PyAny>, ring: &Mutex<Option<Py<PyDict>>>, name: &str) {
    Python::attach(|py| {
        let ring = ring.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|ring| ring.clone_ref(py));
        if let Err(error) = callback.call1(py, (ring,)) {
            logging::exception(py, &format!("{name}: exception in what watches the ring"), &error);
        }
    });
}

#[pymethods]
impl VirtQueue {
    #[new]
    fn new(state: &DeviceState, name: String, index: u16, max_size: u16) -> PyResult<Self> {
        pyvirtio_core::VirtQueue::new(state.inner.clone(), name, index, max_size)
            .map(|inner| Self { inner: Arc::new(inner), ring: Arc::default() })
            .map_err(os_error)
    }

    #[getter]
    fn name(&self) -> &str {
        self.inner.name()
    }

    #[getter]
    fn handler_name(&self) -> String {
        self.inner.handler_name()
    }

    #[getter]
    fn index(&self) -> u16 {
        self.inner.index()
    }

    #[getter]
    fn max_size(&self) -> u16 {
        self.inner.max_size()
    }

    #[getter]
    fn size(&self) -> u16 {
        self.inner.size()
    }

    #[getter]
    fn ready(&self) -> bool {
        self.inner.size() > 0
    }

    #[getter]
    fn attached(&self) -> bool {
        self.inner.attached()
    }

    #[getter]
    fn kick_fd(&self) -> RawFd {
        self.inner.kick_fd()
    }

    #[pyo3(signature = (memory, handler, *, size, desc, avail, used, packed = false, in_order = false,
                        event_idx = false, indirect = false, notify_on_empty = false, next_avail = 0, next_used = 0,
                        inflight = None))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn start(
        slf: &Bound<'_, Self>,
        memory: &Bound<'_, GuestMemory>,
        handler: &Bound<'_, PyAny>,
        size: u32,
        desc: u64,
        avail: u64,
        used: u64,
        packed: bool,
        in_order: bool,
        event_idx: bool,
        indirect: bool,
        notify_on_empty: bool,
        next_avail: u16,
        next_used: u16,
        inflight: Option<&InflightRegion>,
    ) -> PyResult<()> {
        let vq = &slf.get().inner;
        // A size that does not fit is refused like any other past the maximum.
        let size = u16::try_from(size).unwrap_or(u16::MAX);
        let inflight = inflight.map(|region| region.inner.clone());
        let config = RingConfig {
            size,
            desc,
            avail,
            used,
            packed,
            in_order,
            event_idx,
            indirect,
            notify_on_empty,
            next_avail,
            next_used,
            inflight,
        };
        vq.start(memory.get().inner.clone(), &config, self::handler(handler, slf)).map_err(guest_error)?;
        slf.get().remember(memory, &config)?;
        vq.looked();
        Ok(())
    }

    fn watch(&self, callback: Py<PyAny>) {
        let (ring, name) = (self.ring.clone(), self.inner.name().to_owned());
        self.inner.watch(Box::new(move || look(&callback, &ring, &name)));
    }

    fn stop(&self, py: Python<'_>) -> (u16, u16) {
        self.inner.looked();
        let position = py.detach(|| self.inner.stop());
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner).take();
        if ring.is_some() {
            self.inner.looked();
        }
        position
    }

    fn hold(&self, py: Python<'_>) {
        py.detach(|| self.inner.hold());
    }

    fn release(&self) {
        self.inner.release();
    }

    #[getter]
    fn position(&self) -> Option<(u16, u16)> {
        self.inner.position()
    }

    #[pyo3(signature = (isr, vector))]
    fn set_interrupt(&self, isr: &Isr, vector: Option<&MsixVector>) {
        self.inner.set_interrupt(Some(interrupt(isr, ISR_QUEUE, vector)));
    }

    #[pyo3(signature = (call))]
    fn set_call(&self, py: Python<'_>, call: Option<&CallFd>) {
        let interrupt = call.map(|call| Interrupt::Call(call.inner.clone()));
        py.detach(|| self.inner.set_interrupt(interrupt)); // waits for one that is being sent
    }

    fn set_memory(&self, memory: &Bound<'_, GuestMemory>) -> PyResult<()> {
        if let Some(ring) = &*self.ring.lock().unwrap_or_else(PoisonError::into_inner) {
            ring.bind(memory.py()).set_item("memory", memory)?;
        }
        self.inner.set_memory(&memory.get().inner).map_err(guest_error)
    }

    fn set_handler(slf: &Bound<'_, Self>, handler: &Bound<'_, PyAny>) {
        let (vq, handler) = (&slf.get().inner, self::handler(handler, slf));
        slf.py().detach(|| vq.set_handler(handler));
    }

    #[pyo3(signature = (tap))]
    fn set_tap(&self, py: Python<'_>, tap: Option<Py<PyAny>>) {
        let tap = tap.map(|tap| Arc::new(PythonTap(tap)) as Arc<dyn Tap>);
        py.detach(|| self.inner.set_tap(tap));
    }

    #[pyo3(signature = (chains, interrupt = None))]
    fn give_back(&self, py: Python<'_>, chains: Vec<PyRef<'_, Completed>>, interrupt: Option<bool>) {
        let chains: Vec<_> = chains.iter().map(|chain| chain.0).collect();
        py.detach(|| self.inner.give_back(&chains, interrupt));
    }

    #[pyo3(signature = (log, used = None))]
    fn set_log(&self, log: Option<&DirtyLog>, used: Option<u64>) {
        self.inner.set_log(log.map(|log| log.inner.clone()), used);
    }

    fn service(&self, py: Python<'_>) -> bool {
        py.detach(|| self.inner.service())
    }

    fn notify(&self, py: Python<'_>) {
        py.detach(|| self.inner.notify());
    }

    fn attach(&self) {
        self.inner.attach();
    }

    fn detach(&self, py: Python<'_>) {
        py.detach(|| self.inner.detach());
    }

    fn signal(&self) {
        self.inner.signal();
    }

    fn interrupt(&self, py: Python<'_>) {
        py.detach(|| self.inner.interrupt());
    }

    fn __iter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __next__(&self) -> Option<Chain> {
        self.inner.pop().map(|inner| Chain { inner })
    }

    #[getter]
    fn in_flight(&self) -> u16 {
        self.inner.in_flight()
    }

    #[getter]
    fn asked(&self) -> u64 {
        self.inner.asked()
    }

    #[getter]
    fn kicked(&self) -> u64 {
        self.inner.counters.driver_kicks()
    }

    #[getter]
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.inner.counters.named().into_py_dict(py)
    }

    fn __repr__(&self) -> String {
        format!("<VirtQueue {} of {}>", self.inner.name(), self.inner.state().name())
    }
}
