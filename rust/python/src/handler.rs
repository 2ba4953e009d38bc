//! Who serves a queue: a Python callable, or something native.

use std::sync::Arc;

use pyo3::prelude::*;
use pyvirtio_core::Handler;

use crate::blk::BlkPlane;
use crate::buffer;
use crate::errors::{GuestError, StaleChain};
use crate::logging;
use crate::net::NetPlane;
use crate::queue::VirtQueue;

/// The handler an object of Python stands for, called with `vq`.
pub fn handler(object: &Bound<'_, PyAny>, vq: &Bound<'_, VirtQueue>) -> Arc<dyn Handler> {
    native(object, vq).unwrap_or_else(|| Arc::new(PythonHandler::new(object, vq)))
}

/// A handler that runs without Python.
fn native(object: &Bound<'_, PyAny>, vq: &Bound<'_, VirtQueue>) -> Option<Arc<dyn Handler>> {
    let blk = object.cast::<BlkPlane>().map(|plane| plane.get().handler(vq.py(), &vq.get().inner));
    blk.or_else(|_| object.cast::<NetPlane>().map(|plane| plane.get().handler())).ok()
}

/// Calls Python once per pass.
struct PythonHandler {
    callable: Py<PyAny>,
    vq: Py<VirtQueue>,
    name: String,
}

impl PythonHandler {
    fn new(callable: &Bound<'_, PyAny>, vq: &Bound<'_, VirtQueue>) -> Self {
        let name = named(callable).unwrap_or_else(|_| String::from("the handler"));
        Self { callable: callable.clone().unbind(), vq: vq.clone().unbind(), name }
    }
}

/// "Class.method" of a bound method.
fn named(callable: &Bound<'_, PyAny>) -> PyResult<String> {
    let class = callable.getattr("__self__")?.get_type().name()?;
    Ok(format!("{class}.{}", callable.getattr("__name__")?))
}

impl Handler for PythonHandler {
    fn handle(&self, vq: &Arc<pyvirtio_core::VirtQueue>) {
        Python::attach(|py| {
            if let Err(error) = buffer::while_lent(py, || self.callable.call1(py, (&self.vq,))) {
                self.raised(py, error, vq);
            }
        });
    }

    fn name(&self) -> &str {
        &self.name
    }
}

impl PythonHandler {
    /// Whose fault an exception of a handler is decides what happens (see `pyvirtio.errors`).
    fn raised(&self, py: Python<'_>, error: PyErr, vq: &pyvirtio_core::VirtQueue) {
        if error.is_instance_of::<StaleChain>(py) {
            return;
        }
        let (name, value) = (vq.name(), error.value(py).to_string());
        if error.is_instance_of::<GuestError>(py) {
            vq.state().fail(&format!("{name}: {value}"));
            return;
        }
        // The traceback first: whoever is told of the failure may look for it.
        logging::exception(py, &format!("{}: {name}: exception in {}", vq.state().name(), self.name), &error);
        let kind = error.get_type(py).name().map_or_else(|_| String::from("an exception"), |kind| kind.to_string());
        vq.state().fail(&format!("{name}: {} raised {kind}: {value}", self.name));
    }
}
