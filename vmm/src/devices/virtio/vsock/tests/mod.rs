//! The device driven by a model of a guest, on a real event loop.
//!
//! * [`guest`] - the model: a driver, and sockets that keep account of credit.
//! * [`streams`] - connecting, data, credit, ends.
//! * [`many`] - big transfers, many connections, fairness, lack of buffers.
//! * [`pause`] - pauses, and what is saved.
//! * [`hostile`] - guests that break the rules.

mod guest;
mod hostile;
mod many;
mod pause;
mod streams;
