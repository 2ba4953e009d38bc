//! `DeviceState`.

use std::sync::Arc;

use pyo3::prelude::*;
use pyvirtio_core::interrupt::ISR_CONFIG;

use crate::interrupt::{interrupt, Isr, MsixVector};

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct DeviceState {
    pub inner: Arc<pyvirtio_core::DeviceState>,
}

#[pymethods]
impl DeviceState {
    #[new]
    fn new(name: String, on_broken: Py<PyAny>) -> Self {
        let tell = Box::new(move |reason: &str| tell(&on_broken, reason));
        Self { inner: Arc::new(pyvirtio_core::DeviceState::new(name, tell)) }
    }

    #[getter]
    fn name(&self) -> &str {
        self.inner.name()
    }

    #[getter]
    fn broken(&self) -> Option<String> {
        self.inner.broken()
    }

    #[getter]
    fn driver_ok(&self) -> bool {
        self.inner.driver_ok()
    }

    #[setter]
    fn set_driver_ok(&self, driver_ok: bool) {
        self.inner.set_driver_ok(driver_ok);
    }

    fn fail(&self, py: Python<'_>, reason: &str) {
        py.detach(|| self.inner.fail(reason));
    }

    #[pyo3(signature = (isr, vector))]
    fn set_config_interrupt(&self, isr: &Isr, vector: Option<&MsixVector>) {
        self.inner.set_config_interrupt(Some(interrupt(isr, ISR_CONFIG, vector)));
    }

    fn notify_config(&self) {
        self.inner.notify_config();
    }

    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.inner.reset());
    }
}

/// Call `on_broken` from any thread, and from a destructor, where an exception may be on its way.
fn tell(on_broken: &Py<PyAny>, reason: &str) {
    Python::attach(|py| {
        let raised = PyErr::take(py);
        if let Err(error) = on_broken.call1(py, (reason,)) {
            error.write_unraisable(py, Some(on_broken.bind(py)));
        }
        if let Some(raised) = raised {
            raised.restore(py);
        }
    });
}
