#include "io/backend.h"

namespace zinf::io {

void PieceQueue::push(std::shared_ptr<Ticket> ticket) {
  const bool several = ticket->length() > block_bytes_;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    tickets_[static_cast<size_t>(ticket->op())].push_back(std::move(ticket));
  }
  if (several) {
    work_.notify_all();
  } else {
    work_.notify_one();
  }
}

void PieceQueue::push(Piece piece) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    pieces_.push_back(std::move(piece));
  }
  work_.notify_one();
}

Piece PieceQueue::take() {
  Piece piece;
  if (!pieces_.empty()) {
    piece = std::move(pieces_.front());
    pieces_.pop_front();
  } else {
    size_t line = in_flight_[0] <= in_flight_[1] ? 0 : 1;
    if (tickets_[line].empty()) line = 1 - line;
    if (tickets_[line].empty()) return piece;
    const std::shared_ptr<Ticket> &ticket = tickets_[line].front();
    piece = ticket->next_piece(block_bytes_);
    if (ticket->exhausted()) tickets_[line].pop_front();
  }
  ++in_flight_[static_cast<size_t>(piece.ticket->op())];
  return piece;
}

Piece PieceQueue::pop() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (Piece piece = take()) return piece;
    if (stopped_) return {};
    work_.wait(lock);
  }
}

Piece PieceQueue::try_pop() {
  std::lock_guard<std::mutex> lock(mutex_);
  return take();
}

void PieceQueue::finished(Op op) {
  std::lock_guard<std::mutex> lock(mutex_);
  --in_flight_[static_cast<size_t>(op)];
}

void PieceQueue::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
  }
  work_.notify_all();
}

} // namespace zinf::io
