CREATE TABLE product (id int PRIMARY KEY, name text NOT NULL, price numeric NOT NULL);
CREATE TABLE sale (id int PRIMARY KEY, product int NOT NULL REFERENCES product);
